"""Data: from what people have to batches. Nothing here knows a model.

openi, mimic, chexpert_plus, padchest, tabular, r2gen   sources, read as studies
preparing    studies to one validated annotation file
checking     what is wrong with a data set; `check_page` shows it
images       image files to pixels; `dicom`, and the shared `image_cache`
reports      R2Gen's cleaning, sections, de-identification marks
dataset      studies as batches; `loading` makes them from flags
phantoms     synthetic studies, for tests and the demonstration
"""
