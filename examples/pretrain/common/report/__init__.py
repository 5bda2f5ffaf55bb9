"""What is known after a run: ``report.html`` and ``report.md``, written at its end, also when it was stopped."""
