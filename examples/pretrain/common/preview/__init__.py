"""``python examples/pretrain/METHOD.py preview``: what a run would see and cost, before it is started."""
