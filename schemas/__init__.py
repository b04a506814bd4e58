"""What data is: records, codecs, state layouts, tables, reasons and errors."""
