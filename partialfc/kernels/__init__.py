"""One hot operation a file: a plain-torch twin and, where a GPU gains by it, a Triton version of one signature."""
