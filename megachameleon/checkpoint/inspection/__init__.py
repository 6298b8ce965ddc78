"""What a checkpoint of any format is, also a damaged or unfinished one; nothing that is opened is executed."""
