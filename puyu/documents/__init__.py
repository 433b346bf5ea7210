"""Raw files -> Documents, without torch: readers, main text of HTML, language, the stage contract, the ledger."""
