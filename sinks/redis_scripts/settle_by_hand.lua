-- Settles the unknown that a person saw, and no other that came since.
-- ARGV  4 the ordinal as 4 bytes, 5 'accepted' or 'resend', 6 the held matter.
local field = ARGV[4]
local ordinal = read('>I4', field)
if ordinal >= count then return {'outside', ordinal, count} end
if redis.call('HGET', KEYS[3], field) ~= ARGV[6] then return {'ok', seq, 0} end
if ARGV[5] == 'accepted' then accept(field) else put(field, false) end
return {'ok', save(), 1}
