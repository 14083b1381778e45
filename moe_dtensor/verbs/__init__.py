"""The commands of ``python -m moe_dtensor``: a module here that defines ``HELP`` is a verb.

``HELP`` is one line, a plain string literal; ``main(argv) -> exit code`` runs the verb.
"""
