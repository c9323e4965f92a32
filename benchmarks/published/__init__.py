"""Other people's measured trainings (``rows.csv``) against what is predicted for them: see ``__main__.py``."""
