"""Why a run proves nothing."""

from __future__ import annotations


class DemoFailed(Exception):
    """The demo could not do its work; the text is for the person at the terminal."""
