"""The commands of ``python -m moe_dtensor``: a module here is a verb.

Each has ``HELP``, one line as a string literal, and ``main(argv) -> exit code``.
"""
