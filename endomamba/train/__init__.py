"""Training: one loop for any step, data from one manifest, checkpoints that survive a kill at any instant.

manifest.py    the list of clips: format, check; layouts.py writes it from folders, published.py of data sets
build.py       clips for pre-training out of long videos
data.py        clips out of videos with targets.py's masks, boxes and landmarks, changed by augment.py
plan.py        which of them step k trains on
config.py      what every training is configured by
optim.py       parameter groups, layer decay, schedule
loop.py        the loop; world.py its processes, progress.py what it tells, errors.py what ends it
checkpoint.py  complete, atomic, rotating checkpoints
pretrain.py    masked pre-training, with a teacher or without
finetune.py    any task of tasks.py, with and without carried state; evaluate.py judges it
metrics.py     from predictions to the numbers that papers report; surface.py and relaxed.py those no library has
recipes.py     named configurations
"""
