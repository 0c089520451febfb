"""Makes the tables and pictures of README.md and docs/ from the code and from what was measured."""
