"""Send artifacts to the model hub and fetch them from it."""
