#include "rank_table.h"

#include "json.h"

#include <arpa/inet.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define SERVER_ID_MAX 64
#define ADDRESSES_MAX (4 * RANK_TABLE_RANKS_MAX)

struct parse {
    struct rank_table *table;
    bool super_pods; /* the product knows version 1.2 */
    bool version_1_2;
    bool seen[RANK_TABLE_RANKS_MAX];
    const char *server_ids[RANK_TABLE_RANKS_MAX];
    uint32_t server_first_rank[RANK_TABLE_RANKS_MAX], server_last_rank[RANK_TABLE_RANKS_MAX];
    char addresses[ADDRESSES_MAX][INET6_ADDRSTRLEN];
    int address_count;
    char *reason;
    size_t reason_size;
};

struct field {
    const char *name;
    enum json_kind kind;
    bool required;
};

__attribute__((format(printf, 2, 3))) static bool refuse(struct parse *p, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(p->reason, p->reason_size, format, arguments);
    va_end(arguments);
    return false;
}

/* The object has the required fields, none that nobody knows, and each is of its kind. */
static bool check_fields(struct parse *p, const struct json *object, const char *where, const struct field *fields)
{
    if (object->kind != JSON_OBJECT)
        return refuse(p, "%s must be an object, not %s", where, json_kind_name(object->kind));
    for (const struct field *field = fields; field->name != NULL; field++)
        if (field->required && json_member(object, field->name) == NULL)
            return refuse(p, "%s lacks \"%s\"", where, field->name);
    for (const struct json *member = object->child; member != NULL; member = member->next) {
        const struct field *field = fields;
        while (field->name != NULL && strcmp(field->name, member->name) != 0)
            field++;
        if (field->name == NULL)
            return refuse(p, "%s has an unknown field \"%s\"", where, member->name);
        if (member->kind != field->kind)
            return refuse(p, "\"%s\" of %s must be %s, not %s", member->name, where, json_kind_name(field->kind),
                          json_kind_name(member->kind));
    }
    return true;
}

/* A decimal number as text: digits only, no leading zero. */
static bool read_number(const char *text, uint64_t limit, uint64_t *value)
{
    size_t digits = strspn(text, "0123456789");
    if (digits == 0 || digits > 19 || text[digits] != '\0' || (digits > 1 && text[0] == '0'))
        return false;
    *value = 0;
    for (; *text != '\0'; text++)
        *value = *value * 10 + (uint64_t)(*text - '0');
    return *value <= limit;
}

static bool number_field(struct parse *p, const struct json *object, const char *name, uint64_t low, uint64_t high,
                         uint64_t absent, uint64_t *value)
{
    const struct json *member = json_member(object, name);
    *value = absent;
    if (member == NULL || (read_number(member->text, high, value) && *value >= low))
        return true;
    return refuse(p, "\"%s\" must be a number from %llu to %llu, not \"%s\"", name, (unsigned long long)low,
                  (unsigned long long)high, member->text);
}

static bool valid_address(const char *text)
{
    struct in6_addr address;
    return inet_pton(AF_INET, text, &address) == 1 || inet_pton(AF_INET6, text, &address) == 1;
}

/* Notes every address of a comma-separated list; each may stand in a table once. */
static bool address_list(struct parse *p, const struct json *device, const char *name, char *first)
{
    const struct json *member = json_member(device, name);
    if (member == NULL || member->text[0] == '\0')
        return true;
    const char *at = member->text;
    for (bool more = true; more;) {
        size_t length = strcspn(at, ",");
        char address[INET6_ADDRSTRLEN] = "";
        if (length < sizeof address)
            memcpy(address, at, length);
        if (!valid_address(address))
            return refuse(p, "\"%s\" is no address or list of addresses: \"%s\"", name, member->text);
        for (int i = 0; i < p->address_count; i++)
            if (strcmp(p->addresses[i], address) == 0)
                return refuse(p, "address %s occurs twice", address);
        if (p->address_count == ADDRESSES_MAX)
            return refuse(p, "too many addresses");
        strcpy(p->addresses[p->address_count++], address);
        if (first[0] == '\0')
            strcpy(first, address);
        more = at[length] == ',';
        at += length + 1;
    }
    return true;
}

static bool read_device(struct parse *p, const struct json *device, int server)
{
    static const struct field fields[] = {
        {"device_id", JSON_STRING, true},
        {"rank_id", JSON_STRING, true},
        {"device_ip", JSON_STRING, false},
        {"device_port", JSON_STRING, false},
        {"host_port", JSON_STRING, false},
        {"super_device_id", JSON_STRING, false},
        {"backup_device_ip", JSON_STRING, false},
        {"backup_device_port", JSON_STRING, false},
        {NULL, JSON_NULL, false},
    };
    static const char *const of_1_2[] = {"super_device_id", "backup_device_ip", "backup_device_port"};
    uint64_t id, rank, port, unused;
    char backup[INET6_ADDRSTRLEN] = "";
    if (!check_fields(p, device, "a device", fields) || !number_field(p, device, "device_id", 0, UINT32_MAX, 0, &id) ||
        !number_field(p, device, "rank_id", 0, RANK_TABLE_RANKS_MAX - 1, 0, &rank) ||
        !number_field(p, device, "device_port", 1024, 65535, RANK_TABLE_DEFAULT_PORT, &port) ||
        !number_field(p, device, "host_port", 1024, 65535, 0, &unused) ||
        !number_field(p, device, "backup_device_port", 1024, 65535, 0, &unused) ||
        !number_field(p, device, "super_device_id", 0, UINT32_MAX, 0, &unused))
        return false;
    for (size_t i = 0; i < sizeof of_1_2 / sizeof *of_1_2; i++)
        if (!p->version_1_2 && json_member(device, of_1_2[i]) != NULL)
            return refuse(p, "\"%s\" belongs to version 1.2", of_1_2[i]);
    if (p->seen[rank])
        return refuse(p, "rank_id \"%u\" occurs twice", (unsigned)rank);
    for (uint32_t other = 0; other < RANK_TABLE_RANKS_MAX; other++)
        if (p->seen[other] && p->table->entry[other].server == server && p->table->entry[other].device == id)
            return refuse(p, "device_id \"%u\" occurs twice in server \"%s\"", (unsigned)id, p->server_ids[server]);
    struct rank_entry *entry = &p->table->entry[rank];
    *entry = (struct rank_entry){.server = server, .device = (uint32_t)id, .port = (uint16_t)port, .pod = -1};
    entry->has_super_device = json_member(device, "super_device_id") != NULL;
    p->seen[rank] = true;
    p->table->ranks++;
    if (rank < p->server_first_rank[server])
        p->server_first_rank[server] = (uint32_t)rank;
    if (rank > p->server_last_rank[server])
        p->server_last_rank[server] = (uint32_t)rank;
    return address_list(p, device, "device_ip", entry->address) && address_list(p, device, "backup_device_ip", backup);
}

static bool read_server(struct parse *p, const struct json *server)
{
    static const struct field fields[] = {
        {"server_id", JSON_STRING, true},
        {"device", JSON_ARRAY, true},
        {"host_ip", JSON_STRING, false},
        {NULL, JSON_NULL, false},
    };
    if (!check_fields(p, server, "a server", fields))
        return false;
    const char *id = json_member(server, "server_id")->text;
    if (id[0] == '\0' || strlen(id) > SERVER_ID_MAX)
        return refuse(p, "\"server_id\" must have 1 to %d characters: \"%s\"", SERVER_ID_MAX, id);
    for (int i = 0; i < p->table->servers; i++)
        if (strcmp(p->server_ids[i], id) == 0)
            return refuse(p, "server_id \"%s\" occurs twice", id);
    const struct json *host = json_member(server, "host_ip");
    if (host != NULL && !valid_address(host->text))
        return refuse(p, "\"host_ip\" is no address: \"%s\"", host->text);
    const struct json *devices = json_member(server, "device");
    if (devices->child == NULL)
        return refuse(p, "server \"%s\" has no device", id);
    int index = p->table->servers++;
    p->server_ids[index] = id;
    p->server_first_rank[index] = UINT32_MAX;
    for (const struct json *device = devices->child; device != NULL; device = device->next)
        if (!read_device(p, device, index))
            return false;
    uint32_t span = p->server_last_rank[index] - p->server_first_rank[index] + 1;
    if (span != json_length(devices))
        return refuse(p, "the ranks of server \"%s\" are not in a row", id);
    return true;
}

static bool read_servers(struct parse *p, const struct json *top)
{
    const struct json *list = json_member(top, "server_list");
    size_t length = json_length(list);
    uint64_t count;
    if (length == 0 || length > RANK_TABLE_RANKS_MAX)
        return refuse(p, "\"server_list\" must have 1 to %d servers", RANK_TABLE_RANKS_MAX);
    if (!number_field(p, top, "server_count", 1, RANK_TABLE_RANKS_MAX, length, &count))
        return false;
    if (count != length)
        return refuse(p, "\"server_count\" is %u, and there are %zu servers", (unsigned)count, length);
    for (const struct json *server = list->child; server != NULL; server = server->next)
        if (!read_server(p, server))
            return false;
    for (uint32_t rank = 0; rank < p->table->ranks; rank++)
        if (!p->seen[rank])
            return refuse(p, "rank_id \"%u\" is missing: ranks go from 0 without gaps", rank);
    return true;
}

static int find_server(const struct parse *p, const char *id)
{
    for (int i = 0; i < p->table->servers; i++)
        if (strcmp(p->server_ids[i], id) == 0)
            return i;
    return -1;
}

/* The servers of one super pod follow each other in the table's list. */
static bool read_pod(struct parse *p, const struct json *pod, int index, int *pod_of_server)
{
    static const struct field fields[] = {
        {"super_pod_id", JSON_STRING, true}, {"server_list", JSON_ARRAY, true}, {NULL, JSON_NULL, false}};
    static const struct field server_fields[] = {{"server_id", JSON_STRING, true}, {NULL, JSON_NULL, false}};
    if (!check_fields(p, pod, "a super pod", fields))
        return false;
    const char *pod_id = json_member(pod, "super_pod_id")->text;
    const struct json *servers = json_member(pod, "server_list");
    if (pod_id[0] == '\0' || servers->child == NULL)
        return refuse(p, "a super pod needs a \"super_pod_id\" and at least one server");
    int low = RANK_TABLE_RANKS_MAX, high = -1;
    for (const struct json *server = servers->child; server != NULL; server = server->next) {
        if (!check_fields(p, server, "a server of a super pod", server_fields))
            return false;
        const char *id = json_member(server, "server_id")->text;
        int found = find_server(p, id);
        if (found < 0)
            return refuse(p, "super pod \"%s\" names server \"%s\", which the table has not", pod_id, id);
        if (pod_of_server[found] >= 0)
            return refuse(p, "server \"%s\" is in two super pods, or twice in one", id);
        pod_of_server[found] = index;
        low = found < low ? found : low;
        high = found > high ? found : high;
    }
    if ((size_t)(high - low + 1) != json_length(servers))
        return refuse(p, "the servers of super pod \"%s\" do not stand in a row", pod_id);
    return true;
}

static bool read_pods(struct parse *p, const struct json *list)
{
    int pod_of_server[RANK_TABLE_RANKS_MAX];
    for (int i = 0; i < RANK_TABLE_RANKS_MAX; i++)
        pod_of_server[i] = -1;
    for (const struct json *pod = list->child; pod != NULL; pod = pod->next) {
        if (!read_pod(p, pod, p->table->pods, pod_of_server))
            return false;
        const char *id = json_member(pod, "super_pod_id")->text;
        for (const struct json *other = list->child; other != pod; other = other->next)
            if (strcmp(json_member(other, "super_pod_id")->text, id) == 0)
                return refuse(p, "super_pod_id \"%s\" occurs twice", id);
        p->table->pods++;
    }
    for (int i = 0; i < p->table->servers; i++)
        if (p->table->pods > 0 && pod_of_server[i] < 0)
            return refuse(p, "server \"%s\" is in no super pod", p->server_ids[i]);
    for (uint32_t rank = 0; rank < p->table->ranks; rank++) {
        struct rank_entry *entry = &p->table->entry[rank];
        entry->pod = entry->has_super_device ? pod_of_server[entry->server] : -1;
    }
    return true;
}

static bool read_top(struct parse *p, const struct json *top)
{
    static const struct field fields[] = {
        {"version", JSON_STRING, true},    {"status", JSON_STRING, true},         {"server_count", JSON_STRING, false},
        {"server_list", JSON_ARRAY, true}, {"super_pod_list", JSON_ARRAY, false}, {NULL, JSON_NULL, false},
    };
    if (!check_fields(p, top, "the table", fields))
        return false;
    const char *version = json_member(top, "version")->text, *status = json_member(top, "status")->text;
    p->version_1_2 = strcmp(version, "1.2") == 0;
    if (!p->version_1_2 && strcmp(version, "1.0") != 0)
        return refuse(p, "\"version\" must be \"1.0\" or \"1.2\", not \"%s\"", version);
    if (p->version_1_2 && !p->super_pods)
        return refuse(p, "version 1.2 is for products with super pods; this one takes 1.0");
    if (!p->version_1_2 && json_member(top, "super_pod_list") != NULL)
        return refuse(p, "\"super_pod_list\" belongs to version 1.2");
    if (strcmp(status, "completed") != 0)
        return refuse(p, "\"status\" must be \"completed\", not \"%s\"", status);
    if (!p->super_pods && json_member(top, "server_count") == NULL)
        return refuse(p, "the table lacks \"server_count\"");
    if (!read_servers(p, top))
        return false;
    const struct json *pods = json_member(top, "super_pod_list");
    return pods == NULL || read_pods(p, pods);
}

uint64_t rank_table_digest(const char *text)
{
    uint64_t hash = 14695981039346656037ull; /* FNV-1a */
    for (; *text != '\0'; text++)
        hash = (hash ^ (unsigned char)*text) * 1099511628211ull;
    return hash;
}

bool rank_table_parse(const char *text, bool super_pods, struct rank_table *table, char *reason, size_t reason_size)
{
    struct parse parse = {.table = table, .super_pods = super_pods, .reason = reason, .reason_size = reason_size};
    memset(table, 0, sizeof *table);
    if (strnlen(text, RANK_TABLE_BYTES_MAX + 1) > RANK_TABLE_BYTES_MAX)
        return refuse(&parse, "a rank table has at most %d bytes", RANK_TABLE_BYTES_MAX);
    struct json *top = json_parse(text, reason, reason_size);
    if (top == NULL)
        return false;
    bool good = read_top(&parse, top);
    json_free(top);
    table->digest = rank_table_digest(text);
    return good;
}

bool rank_table_near(const struct rank_table *table, uint32_t a, uint32_t b)
{
    const struct rank_entry *one = &table->entry[a], *other = &table->entry[b];
    return one->server == other->server || (one->pod >= 0 && one->pod == other->pod);
}
