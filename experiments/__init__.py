"""One file a question: its baseline, its arms, what is tuned, the command."""
