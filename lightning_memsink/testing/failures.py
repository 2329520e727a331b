"""How a check fails: the rule, what was found, what was expected, and what to do."""

from __future__ import annotations


def failure(rule: str, subject: str, found: str, expected: str, remedy: str) -> AssertionError:
    """To be raised; ``rule`` is one line, and ``subject`` the name of the class or function that breaks it."""
    return AssertionError(f"{rule}: {subject} breaks this rule.\nFound: {found}.\nExpected: {expected}.\n{remedy}")
