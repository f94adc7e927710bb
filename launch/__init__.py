"""Launch scripts, one job each: flags -> configuration -> calls."""
