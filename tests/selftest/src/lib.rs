//! An application that checks its own kernel and prints the verdicts as JSON lines.
