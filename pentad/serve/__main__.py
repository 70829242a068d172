"""``python -m pentad.serve OPTIONS`` runs a worker; see `pentad.serve.worker`."""

import signal

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the front process decides when a worker ends
        signal.signal(number, signal.SIG_IGN)
    from pentad.serve.worker import main  # takes seconds: a signal must not arrive in the meantime

    main()
