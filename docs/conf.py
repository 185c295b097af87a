"""Configure Sphinx: ``tox run -e check`` builds these pages and runs their examples."""

from importlib.metadata import version as installed_version

project = "torchcache"
author = "torchcache contributors"
project_copyright = author
version = release = installed_version("torchcache")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
# Other pages include these.
exclude_patterns = ["tables"]
# A link to a heading on another page, `usage.md#sizes`, is checked as well.
myst_heading_anchors = 3

# People write single backticks, and mean code.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = f"torchcache {release}"
