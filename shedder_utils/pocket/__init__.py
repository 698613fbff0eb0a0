"""The pocket world: real prose, a small world of people and things, and the models trained on both."""
