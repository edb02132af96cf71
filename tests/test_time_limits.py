"""No test fails because a machine is slow: limits of wall-clock time are ten minutes at least."""

import ast
from pathlib import Path

SHORTEST = 600  # seconds
TESTS = Path(__file__).parent


def limits(source):
    """(line, what) of the time limits under `SHORTEST` in a module: `timeout=30`, and Hypothesis's own of 200 ms."""
    for node in ast.walk(ast.parse(source)):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in ("timeout", "timeout_s") and isinstance(value, int | float) and value < SHORTEST:
                yield node.lineno, f"{keyword.arg}={value}"
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(text.startswith("given(") for text in decorators) and "deadline=None" not in "".join(decorators):
                yield node.lineno, "@given without @settings(deadline=None)"


def test_tests_have_no_short_time_limit():
    found = [
        f"{path.relative_to(TESTS)}:{line}: {what}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, what in limits(path.read_text(encoding="utf-8"))
    ]
    assert not found, found


def test_short_time_limits_are_found():
    source = "run(x, timeout=150)\nwait(timeout=900)\n@given(st.integers())\ndef test(n): ...\n"
    assert sorted(line for line, _ in limits(source)) == [1, 4]
