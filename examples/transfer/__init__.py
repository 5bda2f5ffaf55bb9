"""Transfer recipes: fine-tuning and probing on labelled data, a task a file."""
