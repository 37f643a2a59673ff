"""One file a question: its baseline, the command, the answer expected."""
