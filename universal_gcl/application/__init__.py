"""The search page (`gcl demo`) and the Gradio Space that shows it."""
