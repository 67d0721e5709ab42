"""The TFLite spelling of canonical operators, one family a file; each file has a table `EMITTERS` by kind."""
