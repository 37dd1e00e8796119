"""Hospital data in: a table of DICOM, NIfTI and picture files becomes rows for training that identify no patient."""
