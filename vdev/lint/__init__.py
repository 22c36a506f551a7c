"""The driver linter: which rules of the specifications a guest's driver, or its front-end, breaks. See docs/lint.md."""
