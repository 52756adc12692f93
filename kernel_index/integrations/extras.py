"""Optional packages: a missing one raises a typed error with the command that installs it."""

from kernel_index.core.target import has_package


class MissingExtra(ImportError):
    """The called function needs an optional package that is not installed.

    ``package`` is the missing package and ``extra`` the extra that installs it.

    >>> from kernel_index.integrations.extras import MissingExtra
    >>> print(MissingExtra("transformers", "hf"))
    this needs the transformers package: pip install 'kernel-index[hf]'
    """

    def __init__(self, package: str, extra: str):
        super().__init__(f"this needs the {package} package: pip install 'kernel-index[{extra}]'", name=package)
        self.package, self.extra = package, extra


def require(package: str, extra: str) -> None:
    """Raise ``MissingExtra`` unless the package can be imported; it is not imported here."""
    if not has_package(package):
        raise MissingExtra(package, extra)
