"""The search page of `gcl demo`, and the Gradio Space that shows the same page."""
