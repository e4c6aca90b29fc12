"""Run a page of queries and write under each what it prints: ``python docs/run_queries.py [PAGE]``."""

import ast
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)
"""A block of code, with what was printed the last time."""


def run(text: str) -> list[tuple[str, str | None]]:
    """Every block of code and what its last expression shows, None if it ends in no expression."""
    names: dict[str, object] = {}
    return [(code, shown(code, names)) for code in BLOCK.findall(text)]


def shown(code: str, names: dict[str, object]) -> str | None:
    """Run one block; what a notebook would show below it."""
    *before, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        before, last = [*before, last], None
    exec(compile(ast.Module(before, []), "<page>", "exec"), names)
    if last is None:
        return None
    value = eval(compile(ast.Expression(last.value), "<page>", "eval"), names)
    several = value if isinstance(value, tuple) else (value,)
    return "\n".join(map(str, several))


def written(text: str) -> str:
    """The page with what its blocks show now."""
    answers = iter(run(text))

    def replaced(found: re.Match[str]) -> str:
        code, answer = next(answers)
        assert code == found[1]
        return f"```python\n{code}```\n" + ("" if answer is None else f"\n```text\n{answer}\n```\n")

    return BLOCK.sub(replaced, text)


if __name__ == "__main__":
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/queries.md")
    page.write_text(written(page.read_text()))
