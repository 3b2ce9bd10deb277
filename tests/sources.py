"""Source files of the packages, and their modules' names."""

from tests.readme import REPOSITORY


def sources() -> list[str]:
    """Return the paths of all modules of the packages, relative to the repository, sorted."""
    paths = [path for top in ("engine", "launcher", "tools") for path in (REPOSITORY / top).rglob("*.py")]
    return sorted(str(path.relative_to(REPOSITORY)) for path in paths)


def dotted(source: str) -> str:
    """Return the module's dotted name."""
    return source.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
