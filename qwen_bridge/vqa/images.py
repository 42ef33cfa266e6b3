"""Pictures of a data set on disk: keys, safe paths inside their folders, and decoding with limits.

Every loader of files uses it, so that a picture is found, refused and decoded in one way whatever
format its questions came in.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.records import is_unicode, one_line

# Eight 3840 x 2160 frames: far more than a VLM looks at; a larger file is a bomb or a mistake.
MAX_IMAGE_PIXELS = 8 * 3840 * 2160
# Pillow would start other programs for some formats (EPS); these it decodes itself.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# What undoes each EXIF orientation. Pillow's own `exif_transpose` also writes the EXIF anew, and
# over a damaged tag that fails on photographs that are sound.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class MissingImageError(InputError):
    """There is no file under the image's name."""


class OutsideImageError(InputError):
    """The file is a link, or behind one, that leads out of the image folder."""


class BrokenImageError(InputError):
    """The file cannot be decoded as a picture, or is larger than any picture should be."""


@dataclass(frozen=True)
class ImageFolders:
    """Opens images by key, "FOLDER/FILE", where FOLDER is one of the names in `paths`.

    Keys hold no absolute path, so that a data set can be moved and keep its fingerprint. Where
    bank and queries share a folder they share its name, so that the same file has the same key.

    Attributes:
      paths: the folders, by the role "bank" or "query".
      named_by: what decides a file's name, for messages: a flag or a field.
    """

    paths: dict[str, Path]
    named_by: str = "--image_pattern"

    def folder_of(self, role: str) -> str:
        """The name of the folder that holds the pictures of "bank" or "query"."""
        return role if role in self.paths else "bank"

    def path(self, key: str) -> Path:
        """Where the image is, or should be.

        Raises:
          OutsideImageError: a link leads out of the folder; the folder itself may be a link.
        """
        folder, _, file = key.partition("/")
        path = self.paths[folder] / file
        if not path.resolve().is_relative_to(self._resolved[folder]):
            raise OutsideImageError(
                f"{path}: leads to {path.resolve()}, out of the image folder; copy the file there, "
                f"or give its own folder with --{folder}_images"
            )
        return path

    @functools.cached_property
    def _resolved(self) -> dict[str, Path]:
        return {role: path.resolve() for role, path in self.paths.items()}

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[Image.Image]:
        """Opens an image, its header read and its size allowed; what is read of it may follow.

        Raises:
          MissingImageError: no file.
          OutsideImageError: a link leads out of the folder.
          BrokenImageError: not a picture, or too large; also where the caller's reading fails.
        """
        path = self.path(key)
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise BrokenImageError(
                        f"{path}: {image.width} x {image.height} pixels exceed the limit of "
                        f"{MAX_IMAGE_PIXELS}; scale the image down"
                    )
                yield image
        except BrokenImageError:
            raise
        except FileNotFoundError:
            raise MissingImageError(
                f"{path}: no such image; check --{key.partition('/')[0]}_images and {self.named_by}"
            ) from None
        except Exception as error:  # A broken file can make the decoders raise nearly anything.
            raise BrokenImageError(
                f"{path}: cannot be decoded as an image ({one_line(error)}); replace the file "
                "or remove its questions"
            ) from error

    def __call__(self, key: str) -> Image.Image:
        """Decodes an image, upright and in RGB; raises as `open`."""
        with self.open(key) as image:
            return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as people see it, and as transformers hands it to the VLM.

    Turned as its EXIF orientation says, whatever is transparent on white, in RGB.
    """
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return rgb_on_white(image if turn is None else image.transpose(turn))


def rgb_on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, whatever is transparent on white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def image_folders(
    bank_images: str | Path | None,
    query_images: str | Path | None,
    named_by: str = "--image_pattern",
) -> ImageFolders:
    """Checks that the two folders exist, and finds out whether they are one.

    Args:
      bank_images: None where only queries are opened.
      query_images: None where only demonstrations are opened.
      named_by: see `ImageFolders`.

    Raises:
      InputError: one is not a folder.
    """
    given = {"bank": bank_images, "query": query_images}
    paths = {role: Path(path) for role, path in given.items() if path is not None}
    for role, path in paths.items():
        if not path.is_dir():
            raise InputError(f"--{role}_images={path} is not a folder; give the images' folder")
    if len(paths) == 2 and paths["bank"].resolve() == paths["query"].resolve():
        del paths["query"]
    return ImageFolders(paths, named_by)


def path_inside(file: str) -> str | None:
    """A file's path relative to its image folder, made plain.

    None where it would leave the folder, or where no file can have that name.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return None if "\0" in file or not is_unicode(file) else str(path)
