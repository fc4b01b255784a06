"""What every page stands in: navigation, sidebar, panels, downloads, snippets and links."""
