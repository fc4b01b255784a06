"""The pages of ``ssmlens app``: look inside a model, act on it, measure it.

Started as ``streamlit run dashboard.py -- [--models DIR]... [--max-tokens N]``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import streamlit as st

from ssmlens.apps import sources, wording
from ssmlens.apps.frame import pages, shell, sidebar

ICON = Path(__file__).with_name("icon.svg")


def main() -> None:
    """Draw the chosen page once. Every input comes first, so that an error below never costs what was typed."""
    st.set_page_config(page_title="ssmlens", page_icon=str(ICON), layout="wide")
    st.logo(str(ICON), size="large")
    try:
        options = sources.parse(sys.argv[1:])
    except ValueError as error:
        st.error(wording.sentence(error))
        return
    asked = sidebar.show(options)
    groups = pages.groups()
    first = next(iter(groups.values()))[0]
    chosen = st.navigation(
        {
            heading: [
                st.Page(
                    functools.partial(shell.show, page, asked, options),
                    title=page.title,
                    icon=page.icon,
                    url_path=page.path,
                    default=page is first,
                )
                for page in listed
            ]
            for heading, listed in groups.items()
        }
    )
    chosen.run()


if __name__ == "__main__":
    main()
