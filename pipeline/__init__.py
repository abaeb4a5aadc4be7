"""The engine: configuration, plans, runners, and what is shown to the user."""
