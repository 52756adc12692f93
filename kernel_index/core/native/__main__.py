"""``python -m kernel_index.core.native``: ``kernel-index build`` without the packages of the command."""

from kernel_index.core import native

if __name__ == "__main__":
    for built in native.build_all():
        print(built.library)
