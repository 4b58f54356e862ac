"""Training: one loop for any step, data from one manifest, checkpoints that survive a kill at any instant.

manifest.py    the list of clips: format, check, converters
data.py        clips out of videos, augmentation, which clips step k trains on
optim.py       parameter groups, layer decay, schedule
loop.py        the loop and what every training is configured by
checkpoint.py  complete, atomic, rotating checkpoints
finetune.py    classification and surgical phase, with and without carried state; evaluation
recipes.py     named configurations
"""
