"""Source files of the packages, their modules' names, and what they import."""

import ast
from functools import cache

from tests.readme import REPOSITORY


def sources() -> list[str]:
    """Return the paths of all modules of the packages, relative to the repository, sorted."""
    paths = [path for top in ("engine", "launcher", "tools") for path in (REPOSITORY / top).rglob("*.py")]
    return sorted(str(path.relative_to(REPOSITORY)) for path in paths)


def dotted(source: str) -> str:
    """Return the module's dotted name."""
    return source.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def imports(source: str) -> tuple[str, ...]:
    """Return every module that a file names in an import, at any depth, with the names taken from it."""
    found: list[str] = []
    for node in ast.walk(ast.parse((REPOSITORY / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)
