"""Puts the files of the repository that pages link to into the site (a hook of mkdocs).

A page links to `../examples/x.py` as it lies in the repository; in the site the file lies beside the pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LINK = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add every file outside of docs/ that a page links to."""
    docs = Path(config.docs_dir)
    for page in files.documentation_pages():
        folder = Path(page.abs_src_path).parent
        for up, name in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            target = (folder / up / name).resolve()
            if target.is_relative_to(docs) or not target.is_file():
                continue
            place = target.relative_to(docs.parent).as_posix()
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ lead to where `on_files` put the file."""
    depth = page.file.src_uri.count("/")

    def moved(link: re.Match[str]) -> str:
        outside = len(link[1]) // 3 > depth
        return f"]({'../' * depth}{link[2]}" if outside else link[0]

    return LINK.sub(moved, markdown)
