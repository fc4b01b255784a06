"""Streamlit pages over the public library."""
