"""Problems, transcripts, and the grading of answers."""
