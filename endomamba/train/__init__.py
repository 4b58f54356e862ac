"""Training: one loop for any step, data from one manifest, checkpoints that survive a kill at any instant.

manifest.py    the list of clips: format, check, converters
data.py        clips out of videos (augment.py: changed), and which of them step k trains on
config.py      what every training is configured by
optim.py       parameter groups, layer decay, schedule
loop.py        the loop; world.py its processes, progress.py what it tells, errors.py what ends it
checkpoint.py  complete, atomic, rotating checkpoints
pretrain.py    masked pre-training, with a teacher or without
finetune.py    classification and surgical phase, with and without carried state; evaluation
metrics.py     from predictions to the numbers that papers report
recipes.py     named configurations
"""
