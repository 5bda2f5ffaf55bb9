"""What the transfer recipes share: command line, weights, detectors, batches."""
