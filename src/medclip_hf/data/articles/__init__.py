"""Articles of PubMed Central: fetched, parsed, and their compound figures taken apart."""
