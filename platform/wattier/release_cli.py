"""The commands that make, check and share a release: ``wattier export``, ``wattier verify``, ``wattier push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Release = Annotated[Path, typer.Argument(metavar="RELEASE", help="A folder that `wattier export` made.")]


def verify(release: Release) -> None:
    """Check a release: every file's hash, and that its members are what the manifest says. Nothing of it is run."""
    from wattier_gnn.release import other_files, verify_release

    manifest = verify_release(release)
    noun = "member" if len(manifest.members) == 1 else "members"
    typer.echo(
        f"{release}: {manifest.name}, {len(manifest.members)} {noun} for {', '.join(manifest.sources)}; all "
        f"{len(manifest.files)} files have their sha256; manifest {manifest.sha256}"
    )
    if others := other_files(release, manifest):
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        typer.echo(f"not of the release, never read: {shown}")


def push(
    release: Release,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Made if it is not there.")],
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Another hub than the library's own.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made now is private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Another branch than the main one.")] = None,
) -> None:
    """Push a release to a model hub, in one commit. The token is that of HF_TOKEN or of `hf auth login`."""
    from wattier.hub import push_release

    typer.echo(push_release(release, repository, endpoint=endpoint, private=private, revision=revision))
