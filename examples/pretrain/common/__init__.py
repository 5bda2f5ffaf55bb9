"""What the pretraining recipes share: training, optimisers, command line, backbones."""
