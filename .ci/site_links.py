"""The site's pages from outside the folder of the documentation, and links that leave it.

In the repository a page links to files beside its folder, as to benchmarks/results. On the site
such a link leads to the repository if `repo_url` of mkdocs.yml says where that is; else its text
stays.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

#: Files of the repository's root that are pages of the site.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
#: In the folder of the documentation, and not on the site.
LEFT_OUT = "docs/notebooks"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!\w+:|#)[^)\s]+)\)")


def on_files(files, config):
    """Add the pages of the root."""
    root = Path(config.config_file_path).parent
    for source, name in ROOT_PAGES.items():
        text = (root / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page with links as the site has them; MkDocs checks where they lead."""
    site = page.file.src_uri
    origin = {name: source for source, name in ROOT_PAGES.items()}
    path = origin.get(site, posixpath.join("docs", site))

    def turned(match):
        text, link = match.groups()
        target, mark, anchor = link.partition("#")
        where = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        inside = ROOT_PAGES.get(where) or where.removeprefix("docs/")
        if inside != where and not where.startswith(LEFT_OUT):
            link = posixpath.relpath(inside, posixpath.dirname(site) or ".")
        elif config.repo_url:
            link = f"{config.repo_url.rstrip('/')}/blob/main/{where}"
        else:
            return text
        return f"[{text}]({link}{mark}{anchor})"

    return LINK.sub(turned, markdown)
