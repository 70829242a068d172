"""The HTTP server: a front process that speaks OpenAI's API, and one worker process for each model."""
