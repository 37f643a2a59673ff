"""A folder in an object store, by fsspec: gs:// (gcsfs), s3:// (s3fs), memory://, file://."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cnn_jax.errors import UserError


class Remote:
    """A folder in an object store.

    The methods raise what the store's file system raises, which may be of any type; `explained`
    makes sentences of it.

    Args:
        url: Such as gs://BUCKET/FOLDER; no folder has to be there.

    Errors:
        UserError: A package is missing, or the URL or the credentials are wrong.
    """

    def __init__(self, url: str):
        self.url = url.rstrip('/')
        with self.explained():
            self._fs, self._root = self._opened()

    def _opened(self) -> tuple[Any, str]:
        import fsspec.core

        scheme = self.url.partition(':')[0]
        options = {'auto_mkdir': True} if scheme == 'file' else {}
        try:
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            how = 'pip install -r requirements-gcs.txt' if scheme in ('gs', 'gcs') else 'install it'
            raise UserError(f'{self.url} needs a package ({reason(error)}); {how}') from error
        return fs, root.rstrip('/')

    def _path(self, name: str) -> str:
        return f'{self._root}/{name}'

    def names(self) -> list[str]:
        """The names of all files, those in folders as folder/name."""
        paths = [path for path in self._fs.find(self._root) if not path.endswith('/')]
        return [path.removeprefix(self._path('')) for path in paths]

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return self._fs.cat_file(self._path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        self._fs.pipe_file(self._path(name), content)

    def get(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a local folder, under their names."""
        if names := list(names):
            self._fs.get([self._path(name) for name in names], [str(folder / x) for x in names])

    def put(self, names: Iterable[str], folder: Path) -> None:
        """Copy files from a local folder here, under their names."""
        if names := list(names):
            self._fs.put([str(folder / name) for name in names], [self._path(x) for x in names])

    def remove(self, name: str) -> None:
        """Remove a file or a folder if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what the file system raises as a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f'{self.url} cannot be used ({reason(error)}); check the name of the bucket, the '
                'network, and that your credentials allow reading and writing (for gs://: gcloud '
                'auth application-default login)'
            ) from error


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
