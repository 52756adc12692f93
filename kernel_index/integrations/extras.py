"""Optional packages: a missing one is a typed error that holds the command to install it."""

from kernel_index.core.target import has_package


class MissingExtra(ImportError):
    """A part of the library was called whose optional packages are not installed.

    ``package`` is what is missing and ``extra`` the extra that brings it.

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
