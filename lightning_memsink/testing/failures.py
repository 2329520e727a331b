"""The error of a check that fails."""

from __future__ import annotations


def failure(rule: str, subject: str, found: str, expected: str, remedy: str) -> AssertionError:
    """The error to raise: the rule in one line, the class or function that breaks it, and what to do."""
    return AssertionError(f"{rule}: {subject} breaks this rule.\nFound: {found}.\nExpected: {expected}.\n{remedy}")
