"""The console in this process, as the fixture `gpt2`."""

from tests.flows.in_process import gpt2  # noqa: F401
