from tests.serve.conftest import server, tiny  # noqa: F401 - fixtures
